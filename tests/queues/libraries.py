"""Every library of the contract: where it is installed from, its server, and what its own promises are."""

from typing import NamedTuple


class Library(NamedTuple):
    """One line of the contract: a library on one broker."""

    name: str
    app: str  # the module in apps/
    extra: str
    server: str  # "redis", "postgres", "rabbit" or "files"
    pins: tuple[str, ...] = ()
    env: dict[str, str] = {}  # noqa: RUF012 - never written to
    # What a SIGKILL leaves comes back within so many seconds, with the settings of apps/…; None: "loses the job".
    back_s: float | None = 15.0
    # ... and at once, where the same Machine starts again.
    back_here: bool = False
    retries: bool = True  # it has retries with a delay, and the watch can see when
    sees_delays: bool = True  # a probe sees that a job is for later before any drain has
    leaves: bool = True  # its worker stops so quickly that it leaves between two bursts of the hand-over
    short: bool = True  # also in the short form


LIBRARIES = (
    Library("rq", "rq_app", "rq", "redis", back_here=True),
    Library("rq-simple", "rq_simple_app", "rq", "redis", back_s=None, back_here=True, short=False),
    Library("celery-redis", "celery_app", "celery", "redis", back_s=60, back_here=True),
    Library(
        "celery-redis-prefork",
        "celery_app",
        "celery",
        "redis",
        env={"CONTRACT_POOL": "prefork"},
        back_s=60,
        back_here=True,
        leaves=False,
        short=False,
    ),
    Library(
        "celery-redis-solo",
        "celery_app",
        "celery",
        "redis",
        env={"CONTRACT_POOL": "solo"},
        back_s=60,
        back_here=True,
        short=False,
    ),
    Library("celery-rabbit", "celery_app", "celery", "rabbit", back_here=True, sees_delays=False),
    Library("django-postgres", "django_app", "django_tasks", "postgres", back_here=True, retries=False),
    Library("django-sqlite", "django_app", "django_tasks", "files", back_here=True, retries=False),
    Library("streaq", "streaq_app", "streaq", "redis", back_here=True),
    Library("taskiq", "taskiq_app", "taskiq", "redis", back_here=True, back_s=60),
    Library("pgqueuer", "pgqueuer_app", "pgqueuer", "postgres", back_here=True),
    Library("procrastinate", "procrastinate_app", "procrastinate", "postgres", back_here=True),
    Library("dramatiq-redis", "dramatiq_app", "dramatiq", "redis", back_here=True),
    Library("dramatiq-rabbit", "dramatiq_app", "dramatiq", "rabbit", pins=("pika>=1",), back_here=True),
    Library("saq-redis", "saq_app", "saq", "redis", back_s=60, back_here=True),
    Library(
        "saq-postgres",
        "saq_app",
        "saq",
        "postgres",
        pins=("saq[postgres]", "psycopg[binary]"),
        back_s=60,
        back_here=True,
    ),
    Library("arq", "arq_app", "arq", "redis", back_s=60, back_here=True),
    Library("huey-redis", "huey_app", "huey", "redis", back_s=60, back_here=True),
    Library("huey-sqlite", "huey_app", "huey", "files", back_s=60, back_here=True),
)
