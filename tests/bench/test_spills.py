"""The report of spills reads a disassembly."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.bench.test_page import BENCH

CODE = """
0000000000000000 <farthing::dot(int)>:
   0:	mov    $0x4,%eax
   5:	vmovups (%rdi),%zmm1
   9:	vpdpbusd %zmm1,%zmm2,%zmm3
  10:	vmovups %zmm3,0x40(%rsp)
  18:	vaddps -0x8(%rbp),%zmm4,%zmm4
  1c:	mov    %rax,0x8(%rsp)
  20:	dec    %eax
  22:	jne    5 <farthing::dot(int)+0x5>
  24:	cmp    $0x1,%ecx
  26:	ja     0 <farthing::dot(int)>
  28:	ret

0000000000000040 <copy>:
  40:	vmovups %zmm3,0x40(%rsp)
  48:	jne    40 <copy>
"""


def test_innermost_loops_with_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    spills = import_module("spills")
    expected = [spills.Loop("k.o", "farthing::dot(int)", 5, 7, 1, 1, 1)]
    assert list(spills.hot_loops(CODE.splitlines(), "k.o")) == expected
