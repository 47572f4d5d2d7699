"""Token usage of a request, in OpenAI's format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.cost import usage_extension
from farthing.server.accounts import together

if TYPE_CHECKING:
    from farthing.server.jobs import Job


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request, summed over its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    reasoning_tokens: int = 0  # completion tokens
    with_cost: bool = False  # report the cost in `x_farthing`

    def document(self, job: Job) -> dict[str, Any]:
        """The `usage` object of a job whose streams have all finished."""
        document: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }
        if self.with_cost and job.costs:
            document["x_farthing"] = usage_extension(together(job.costs))
        return document
