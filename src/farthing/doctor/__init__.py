"""Checks of this machine's capabilities, with advice on what to install.

report = examine()          # a list of checks; briefly measures memory bandwidth
report.healthy              # whether `farthing serve` will work here
"""

from farthing.doctor.machine import Check, Diagnosis, examine

__all__ = ["Check", "Diagnosis", "examine"]
