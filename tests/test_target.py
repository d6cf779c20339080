"""Targets: what can wake a machine, and the sentence for what never will."""

import pytest

from waker import UsageError
from waker.config import WakerConfig
from waker.target import parse


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://[fdaa:0:6ba9:0:1::2]", "http://[fdaa:0:6ba9:0:1::2]/"),
        ("fdaa:0:6ba9:0:1::2", "http://[fdaa:0:6ba9:0:1::2]/"),
        ("[fdaa:0:6ba9:0:1::2]", "http://[fdaa:0:6ba9:0:1::2]/"),
        ("http://fdaa:0:6ba9:0:1::2/", "http://[fdaa:0:6ba9:0:1::2]/"),
        ("[fdaa:3:9018:0:1::7]:8080", "http://[fdaa:3:9018:0:1::7]:8080/"),
        ("FDAA:3:9018:0:1:0:0:7", "http://[fdaa:3:9018:0:1::7]/"),
        ("my-worker.flycast", "http://my-worker.flycast/"),
        ("My-Worker.Flycast.", "http://my-worker.flycast/"),
        ("http://my-worker.flycast:80/wake", "http://my-worker.flycast/wake"),
        ("worker:8080", "http://worker:8080/"),
        ("localhost:8080", "http://localhost:8080/"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080/"),
        ("http://queue.example.com", "http://queue.example.com/"),
        ("HTTPS://my-worker.fly.dev", "https://my-worker.fly.dev/"),
        ("https://wake.example.com:8443/hook/", "https://wake.example.com:8443/hook/"),
        ("  http://my-worker.flycast\n", "http://my-worker.flycast/"),
        ("http://some_service", "http://some_service/"),
        ("::1", "http://[::1]/"),
    ],
)
def test_an_address_that_leads_through_the_proxy_is_taken(text: str, url: str) -> None:
    assert parse(text).url == url


@pytest.mark.parametrize(
    ("text", "why", "remedy"),
    [
        ("http://my-worker.internal", "started Machines alone", "http://my-worker.flycast"),
        ("ams.my-worker.internal:8080", "started Machines alone", "http://my-worker.flycast"),
        ("http://91857ddf.vm.my-worker.internal", "started Machines alone", "http://my-worker.flycast"),
        ("http://_api.internal:4280", "started Machines alone", "fly ips list"),
        ("fdaa:0:18:a7b:7d:f066:b83b:2", "one Machine's own private address", "fly ips list"),
        ("http://fly-local-6pn:8080", "this very Machine", "fly ips list"),
        ("http://[fdaa::3]", "name server", "fly ips list"),
        ("https://my-worker.flycast", "no certificate", "use http://my-worker.flycast"),
        ("https://my-worker.flycast:8443", "no certificate", "use http://my-worker.flycast:8443"),
        ("https://[fdaa:0:6ba9:0:1::2]", "no certificate", "use http://[fdaa:0:6ba9:0:1::2]"),
        ("0.0.0.0:8080", "to listen on", "fly ips list"),
        ("http://[::]:8080", "to listen on", "fly ips list"),
        ("http://[fe80::1]", "no app has", "fly ips list"),
        ("http://224.0.0.1", "no app has", "fly ips list"),
        ("redis://localhost:6379", "HTTP request", "http://"),
        ("http://", "not a host name", "my-worker.flycast"),
        ("http://.flycast", "not a host name", "my-worker.flycast"),
        ("flycast", "name is missing", "my-worker.flycast"),
        ("http://my worker", "not a host name", "my-worker.flycast"),
        ("http://-x.example", "not a host name", "my-worker.flycast"),
        ("http://worker:0", "port 0", "80"),
        ("http://worker:99999", "not an address", "http://"),
        ("http://worker:port", "not an address", "http://"),
        ("http://[fdaa:0:6ba9", "not an address", "http://"),
        ("http://worker/?wake=1", "no query", "leave out"),
        ("http://worker/#now", "no fragment", "leave out"),
        ("", "no target", "http://"),
        ("   ", "no target", "http://"),
    ],
)
def test_an_address_that_can_never_wake_says_why_and_what_to_use(text: str, why: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert why in str(caught.value)
    assert remedy in str(caught.value)


def test_a_password_in_an_address_is_refused_and_never_repeated() -> None:
    with pytest.raises(UsageError, match="token=") as caught:
        parse("http://user:s3cret@my-worker.flycast")
    assert "s3cret" not in str(caught.value)


def test_the_machines_own_address_is_told_by_its_environment() -> None:
    environ = {"WAKER_TARGET": "http://[fdaa:0:6ba9:0:1::2]", "FLY_PRIVATE_IP": "fdaa:0:6ba9:0:1:0:0:2"}
    with pytest.raises(UsageError, match="FLY_PRIVATE_IP"):
        WakerConfig.from_environ(environ)


@pytest.mark.parametrize("name", ["my-worker", "http://my-worker.flycast", "http://my-worker.flycast:80/"])
def test_an_app_is_known_by_its_name_and_by_its_address(name: str) -> None:
    assert parse("my-worker.flycast").serves(["other", name])
    assert not parse("my-worker-2.flycast").serves(["other", name])
    assert not parse("http://my-worker.flycast:8080").serves(["", "redis://x", name])


def test_the_environment_alone_is_enough() -> None:
    environ = {"WAKER_TARGET": "my-worker.flycast", "WAKER_TOKEN": "t0ken", "WAKER_TIMEOUT_S": "2.5"}
    config = WakerConfig.from_environ(environ)
    assert (config.target.url, config.token, config.timeout_s) == ("http://my-worker.flycast/", "t0ken", 2.5)
    assert "t0ken" not in repr(config)


def test_arguments_overrule_the_environment_one_by_one() -> None:
    environ = {"WAKER_TARGET": "nonsense.internal", "WAKER_TOKEN": "old", "WAKER_TIMEOUT_S": "soon"}
    config = WakerConfig.from_environ(environ, target="my-worker.flycast", token="new", timeout_s=1)
    assert (config.target.host, config.token, config.timeout_s) == ("my-worker.flycast", "new", 1.0)


def test_every_wrong_value_is_named_at_once_with_an_example() -> None:
    environ = {"WAKER_TARGET": "my-worker.internal", "WAKER_TOKEN": "se cret\n", "WAKER_TIMEOUT_S": "soon"}
    with pytest.raises(UsageError) as caught:
        WakerConfig.from_environ(environ)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].split("=")[0] for line in lines] == ["WAKER_TARGET", "WAKER_TOKEN", "WAKER_TIMEOUT_S"]
    assert "'soon'" in lines[2]
    assert "like 2.5" in lines[2]
    assert "se cret" not in str(caught.value)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9", ""])
def test_a_time_out_out_of_range_is_refused(seconds: str) -> None:
    with pytest.raises(UsageError, match="WAKER_TIMEOUT_S"):
        WakerConfig.from_environ({"WAKER_TARGET": "w.flycast", "WAKER_TIMEOUT_S": seconds})


def test_no_target_at_all_says_what_to_set() -> None:
    with pytest.raises(UsageError, match="WAKER_TARGET"):
        WakerConfig.from_environ({})
