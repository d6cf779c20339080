"""The line that wakes the worker, after each enqueue and on the commit of what it is enqueued in."""

from django.apps import AppConfig

from waker.queues import nudge_on_enqueue


class Site(AppConfig):
    name = "mysite"

    def ready(self) -> None:
        from django_tasks_db.compat import task_backends

        nudge_on_enqueue(task_backends["default"])
