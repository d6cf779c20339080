"""What the worker does."""

try:
    from django.tasks import task  # Django 6
except ImportError:
    from django_tasks import task


@task()
def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)
