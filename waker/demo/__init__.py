"""The demo: pictures become jobs, machines wake, drain and stop, and what was promised is checked.

tasks.py      the app, as a user would write one: a queue and a task
pictures.py   the input
run.py        the course of it all, and what it came to
show.py       what a person sees of it
"""
