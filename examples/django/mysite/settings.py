"""Django tasks in the database. The image: `worker up mysite.asgi:application`; the tables: `manage.py migrate`."""

import os
from importlib.util import find_spec

SECRET_KEY = os.environ.get("SECRET_KEY", "only for development")
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "mysite.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DATABASE_FILE"]}}
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
INSTALLED_APPS = ["mysite.apps.Site", "django_tasks_db", *([] if find_spec("django.tasks") else ["django_tasks"])]
