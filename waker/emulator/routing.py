"""Which machine gets a request: the start rule and the load balancing, values in, values out.

The edge decides by what it *believes* of the machines (its view is a moment old) and by the requests it has in flight
to each. Sources, in Fly's docs: reference/fly-proxy-autostop-autostart (start rule), reference/load-balancing and
apps/concurrency, networking/dynamic-request-routing (forced routing). Where they disagree, a knob decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .knobs import Knobs
from .states import State

if TYPE_CHECKING:
    import random

__all__ = ["DOWN", "UP", "Forward", "Full", "Limits", "Nobody", "Route", "Start", "View", "Wish", "route"]

UP = frozenset({State.STARTED, State.STARTING, State.RESTARTING})
DOWN = frozenset({State.STOPPED, State.CREATED, State.STOPPING})


@dataclass(frozen=True, slots=True)
class Limits:
    """A service's `concurrency`: requests in flight per machine. No *hard* limit unless one is set."""

    soft: int = 20
    hard: int | None = None


@dataclass(frozen=True, slots=True)
class View:
    """A machine as the edge sees it. *distance*: 0 is the edge's own region."""

    id: str
    state: State
    in_flight: int
    region: str = ""
    distance: int = 0
    recently_stopped: bool = False
    limits: Limits | None = None  # its own, where they differ from the app's
    auto_start: bool | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What the request, or a fly-replay, asks for."""

    only: str | None = None  # this machine and no other
    prefer: str | None = None
    regions: tuple[str, ...] = ()
    prefer_regions: tuple[str, ...] = ()
    besides: frozenset[str] = frozenset()  # these could not take it, or must not
    may_start: bool = True


@dataclass(frozen=True, slots=True)
class Forward:
    """Send it to this machine, which is believed to be up."""

    machine: str


@dataclass(frozen=True, slots=True)
class Start:
    """Start this machine and send it there."""

    machine: str


@dataclass(frozen=True, slots=True)
class Full:
    """All that are up are at the hard limit, and none can be started: it waits for a place."""


@dataclass(frozen=True, slots=True)
class Nobody:
    """No machine may have it."""


Route = Forward | Start | Full | Nobody


def route(
    views: Sequence[View],
    wish: Wish,
    limits: Limits,
    knobs: Knobs,
    rng: "random.Random",
    *,
    auto_start: bool = True,
    start_another: bool = False,
    turn: int = 0,
) -> Route:
    """Choose. *start_another* overlooks idle machines (a fault); *turn* counts requests, for round-robin."""
    views = [view for view in views if view.id not in wish.besides and view.state is not State.DESTROYED]
    if wish.only is not None:
        views = [view for view in views if view.id == wish.only]
    if wish.regions:
        views = [view for view in views if view.region in wish.regions]
    up = [view for view in views if view.state in UP]
    down = [
        view
        for view in views
        if view.state in DOWN and wish.may_start and (auto_start if view.auto_start is None else view.auto_start)
    ]
    open_ = [view for view in up if (hard := (view.limits or limits).hard) is None or view.in_flight < hard]

    preferred = [view for view in (*open_, *down) if view.id == wish.prefer]
    if preferred:
        return (Forward if preferred[0].state in UP else Start)(preferred[0].id)

    free = [view for view in open_ if not _full(view, limits, knobs)]
    start_from_soft = knobs.start_threshold == "soft-limit"
    if knobs.autostart_reach == "zero-to-one" and up:
        down = []
    if free and not (start_another and down):
        return Forward(_pick(free, wish, knobs, rng, turn).id)
    if down and (start_from_soft or not open_ or start_another):
        # The nearest region's; of those, one that has been down for a while before one that just stopped (PM11).
        return Start(min(down, key=lambda view: (*_near(view, wish), view.recently_stopped, rng.random())).id)
    if open_:
        return Forward(_pick(open_, wish, knobs, rng, turn).id)
    return Full() if up else Nobody()


def _full(view: View, limits: Limits, knobs: Knobs) -> bool:
    """Whether the machine has reached its soft limit, in the chosen reading of that."""
    return view.in_flight > (view.limits or limits).soft - (knobs.soft_limit_reading == "at-or-above")


def _near(view: View, wish: Wish) -> tuple[bool, int]:
    return (bool(wish.prefer_regions) and view.region not in wish.prefer_regions, view.distance)


def _pick(views: Sequence[View], wish: Wish, knobs: Knobs, rng: "random.Random", turn: int) -> View:
    nearest = min(_near(view, wish) for view in views)
    views = [view for view in views if _near(view, wish) == nearest]
    if knobs.balance == "round-robin":
        return sorted(views, key=lambda view: view.id)[turn % len(views)]
    if knobs.balance == "least-loaded":
        least = min(view.in_flight for view in views)
        views = [view for view in views if view.in_flight == least]
    return rng.choice(views)
