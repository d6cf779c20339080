"""What can go wrong with the Machines API, named by whose fault it is.

MachinesError           everything below; .status and .request_id are the answer's, if there was one
├── RequestError        the caller's: what was asked for cannot be done as asked
│   ├── TokenRefused    the token is wrong, has expired, or may not do this
│   └── NotFound        there is no such app or machine, as far as the token can see
├── MachineBusy         nobody's: the machine is in a state, or under a lease, that will pass; nothing was done
├── RateLimited         ours: asked too often, or the turn would have come too late; nothing was done
├── PlatformError       the platform's, or the way to it
│   ├── NoCapacity      no room for such a machine in the region; nothing was made
│   ├── Unreachable     no connection: nothing was sent
│   ├── NoAnswer        sent, and not answered: it may have been done
│   └── OutcomeUnknown  looked for afterwards, and still not known
├── JobNotRun           the job's machine was made and never ran; it is deleted
└── JobUnknown          the job may have run
"""

from ..errors import WakeError

__all__ = [
    "JobNotRun",
    "JobUnknown",
    "MachineBusy",
    "MachinesError",
    "NoAnswer",
    "NoCapacity",
    "NotFound",
    "OutcomeUnknown",
    "PlatformError",
    "RateLimited",
    "RequestError",
    "TokenRefused",
    "Unreachable",
]


class MachinesError(WakeError):
    """Base of all errors of the Machines API. *said*: the platform's own words, if it had any."""

    def __init__(
        self, says: str, *, status: int | None = None, request_id: str | None = None, said: str = "", code: str = ""
    ) -> None:
        super().__init__(f"{says} (request {request_id})" if request_id else says)
        self.status = status
        self.request_id = request_id
        self.said = said
        self.code = code


class RequestError(MachinesError):
    """The caller's fault: it cannot be done as asked; the message has the platform's reason."""


class TokenRefused(RequestError):  # noqa: N818 - what happened
    """401 or 403: the token is wrong, has expired, or may not do this."""


class NotFound(RequestError):  # noqa: N818 - what happened
    """404: no such app or machine, as far as the token can see."""


class MachineBusy(MachinesError):  # noqa: N818 - what happened
    """409 or 412: the machine's state or somebody's lease forbids it now. Nothing was done; it may work later."""


class RateLimited(MachinesError):  # noqa: N818 - what happened
    """429, or our own pacing would not let the call go before its deadline. Nothing was done."""


class PlatformError(MachinesError):
    """The platform's fault: a 5xx, a redirect, or an answer that nobody documents."""


class NoCapacity(PlatformError):  # noqa: N818 - what happened
    """The region has no room for such a machine now: another region, a smaller guest, or later."""


class Unreachable(PlatformError):  # noqa: N818 - what happened
    """No connection could be made: nothing was sent."""


class NoAnswer(PlatformError):  # noqa: N818 - what happened
    """The request was sent, and its answer did not come or broke off: it may have been done."""


class OutcomeUnknown(PlatformError):  # noqa: N818 - what happened
    """Something may have been made, and could not be found; the message says what to look for."""


class JobNotRun(MachinesError):  # noqa: N818 - what happened
    """The job's machine was made and never ran. It is deleted, or the message says that it is not."""


class JobUnknown(MachinesError):  # noqa: N818 - what happened
    """The job may have run, and may be running: the message says which machine to look at."""
