"""What a request may meet, beside wrong input: each has its HTTP status in `problems`."""

from ..domain import Failure


class NotFound(Failure):
    """There is no such run or picture."""


class Conflict(Failure):
    """The run stands otherwise than the request needs."""


class Busy(Failure):
    """As many runs as may be are under way."""


class Unavailable(Failure):
    """The models are not there: still loading, or they could not be loaded."""
