"""Django tasks, on PostgreSQL or SQLite; `target` is what mysite/asgi.py calls application."""

import importlib.util
import os
from datetime import timedelta

import django
from django.conf import settings

url = os.environ["CONTRACT_URL"]
if url.startswith("postgresql:"):
    place = url.rpartition("@")[2]
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "USER": "test",
        "HOST": place.partition(":")[0],
        "PORT": place.partition(":")[2].partition("/")[0],
        "NAME": place.rpartition("/")[2],
    }
else:
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{url}/db.sqlite3", "OPTIONS": {"timeout": 20}}
own = importlib.util.find_spec("django.tasks") is not None
settings.configure(
    DATABASES={"default": database},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django_tasks_db"] if own else ["django_tasks", "django_tasks_db"],
    TASKS={"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}},
    USE_TZ=True,
)
django.setup()

if own:
    from django.tasks import task
else:
    from django_tasks import task

import jobs  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.utils import timezone  # noqa: E402

target = get_asgi_application()


@task()
def run(job, args):
    getattr(jobs, job)(*args)


def prepare():
    call_command("migrate", verbosity=0)


def enqueue(job, *args, delay_s=0):
    chosen = run.using(run_after=timezone.now() + timedelta(seconds=delay_s)) if delay_s else run
    chosen.enqueue(job, list(args))
