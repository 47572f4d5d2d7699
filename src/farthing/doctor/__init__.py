"""What this machine can do, and what to install to let it do more.

report = examine()          # a list of checks; measures memory bandwidth for a moment
report.healthy              # whether `farthing serve` will work here
"""

from farthing.doctor.check import Check, Report
from farthing.doctor.examine import examine

__all__ = ["Check", "Report", "examine"]
