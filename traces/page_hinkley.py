"""Has a stream of numbers fallen for good?

Page-Hinkley's test for a decrease of the mean (Page 1954, "Continuous inspection schemes", Biometrika 41).  With m the
running mean of the numbers and ``slack`` the change that is tolerated,

    U_t = U_{t-1} + (x_t - m_t + slack),    P_t = max_{i<=t} U_i,    it has when P_t - U_t > threshold.
"""

from __future__ import annotations

from livedraft.contracts.messages import Record
from msgspec.structs import replace


class PageHinkley(Record, frozen=True, kw_only=True):
    """The test's state.  A new one starts a new test, as after an alarm or a swap.

    The defaults suit accept lengths per trace (spread about 0.5): a fall by 1.0 is found in about ten traces, and
    without a change an alarm is rarer than one in hundreds.
    """

    #: Accept length by which the mean may fall unnoticed.
    slack: float = 0.1
    threshold: float = 8.0
    #: Fewest residuals before an alarm.
    warm_up: int = 8
    count: int = 0
    mean: float = 0.0
    #: U_t and P_t.
    sum: float = 0.0
    peak: float = 0.0

    def observe(self, residual: float) -> PageHinkley:
        """The state after one more residual."""
        mean = self.mean + (residual - self.mean) / (self.count + 1)
        total = self.sum + residual - mean + self.slack
        return replace(self, count=self.count + 1, mean=mean, sum=total, peak=max(self.peak, total))

    @property
    def drifted(self) -> bool:
        """Whether the mean has fallen."""
        return self.count >= self.warm_up and self.peak - self.sum > self.threshold
