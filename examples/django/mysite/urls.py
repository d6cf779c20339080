"""The web: `python -m django runserver`."""

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from .tasks import greet


@csrf_exempt
@transaction.atomic
def order(_: HttpRequest, name: str) -> HttpResponse:
    return HttpResponse(greet.enqueue(name).id, status=202)


urlpatterns = [path("greetings/<name>", order)]
