# The image of a queue worker: `worker up` as a non-root user, nothing left to compile at a cold start.
# The official slim image has no compiled standard library; compiling it here makes every start two to four times faster.
ARG PYTHON_VERSION=3.11

# -- what is installed, in a stage of its own: pip's leftovers stay here ---------------------------------------------------
FROM python:${PYTHON_VERSION}-slim AS build
# An environment without pip of its own: it is smaller, and pip installs into it from outside.
RUN python3 -m venv --without-pip /opt/worker
# In your own project this is your lock file, with wake-on-request in it: COPY requirements.txt . and pip install -r.
COPY pyproject.toml README.md LICENSE /src/
COPY worker /src/worker
COPY waker /src/waker
RUN python3 -m pip --python /opt/worker/bin/python3 install --no-cache-dir --no-compile /src
# unchecked-hash: what is compiled is taken as it is, whatever a file's time says after it went through image layers.
RUN /opt/worker/bin/python3 -m compileall -q --invalidation-mode unchecked-hash /opt/worker/lib

# -- what is deployed ------------------------------------------------------------------------------------------------------
FROM python:${PYTHON_VERSION}-slim
RUN python3 -m compileall -q --invalidation-mode unchecked-hash -x "(site|dist)-packages|/(test|idlelib|lib2to3|turtledemo)/" \
    "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
RUN useradd --uid 10001 --create-home worker && install -d -o worker /data
COPY --from=build /opt/worker /opt/worker
ENV PATH=/opt/worker/bin:$PATH
WORKDIR /app
COPY examples/plain/ .
RUN python3 -m compileall -q .
USER worker
# The exec form: a shell would take the stop signal and not pass it on.
ENTRYPOINT ["worker"]
CMD ["up", "tasks:queue"]
