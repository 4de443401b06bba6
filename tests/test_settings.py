"""Settings: each read from its variable, and invalid ones refused."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from app.settings import SettingError, Settings, database_hosts, misspelled


def test_nothing_set_gives_the_defaults() -> None:
    """A user sets nothing; empty variables count as unset."""
    assert Settings.read({}) == Settings()
    assert Settings.read({"PORT": "", "DATABASE_URL": " "}) == Settings()


def test_every_setting_can_be_given() -> None:
    """A user sets everything, with units."""
    assert Settings.read(
        {
            "HOST": "0.0.0.0",
            "PORT": "9000",
            "DATABASE_URL": "postgresql://me:secret@db.example.org:5433/shop?sslmode=require",
            "DATA_DIR": "/var/lib/tablecast",
            "THINGS": "No",
            "POOL_SIZE": "3",
            "FEED_RETENTION": "7d",
            "FEED_MAX_CHANGES": "1_000",
            "PING_INTERVAL": "500ms",
            "PING_TIMEOUT": "1.5",
            "CLIENT_BUFFER": "64KiB",
            "CLIENT_STALL": "2m",
            "ALLOWED_ORIGINS": "https://example.org, http://localhost:3000",
            "TRUSTED_PROXIES": "10.0.0.0/8, ::1",
            "ROOT_PATH": "/app/live/",
            "LOG_LEVEL": "WARNING",
        }
    ) == Settings(
        host="0.0.0.0",
        port=9000,
        database_url="postgresql://me:secret@db.example.org:5433/shop?sslmode=require",
        data_dir=Path("/var/lib/tablecast"),
        things=False,
        pool_size=3,
        feed_retention=7 * 86400,
        feed_max_changes=1000,
        ping_interval=0.5,
        ping_timeout=1.5,
        client_buffer=65536,
        client_stall=120,
        allowed_origins=("https://example.org", "http://localhost:3000"),
        trusted_proxies=(ip_network("10.0.0.0/8"), ip_network("::1")),
        root_path="/app/live",
        log_level="warning",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOST", "two words"),
        ("HOST", "http://localhost"),
        ("THINGS", "false"),
        ("PORT", "70000"),
        ("PORT", "-1"),
        ("PORT", "http"),
        ("PORT", "8000.5"),
        ("PORT", "1_"),
        ("PORT", "٣"),
        ("DATA_DIR", __file__),
        ("POOL_SIZE", "0"),
        ("FEED_RETENTION", "soon"),
        ("FEED_RETENTION", "0"),
        ("FEED_RETENTION", "24 hours"),
        ("FEED_RETENTION", "99999d"),
        ("FEED_RETENTION", "nan"),
        ("FEED_MAX_CHANGES", "0"),
        ("PING_INTERVAL", "-1"),
        ("PING_TIMEOUT", "1e9"),
        ("CLIENT_BUFFER", "1"),
        ("CLIENT_BUFFER", "1MB"),
        ("CLIENT_STALL", "inf"),
        ("ALLOWED_ORIGINS", "example.org"),
        ("ALLOWED_ORIGINS", "https://example.org/path"),
        ("ALLOWED_ORIGINS", "null"),
        ("TRUSTED_PROXIES", "localhost"),
        ("ROOT_PATH", "app"),
        ("ROOT_PATH", "/a b"),
        ("ROOT_PATH", "/../app"),
        ("ROOT_PATH", "/api/live"),
        ("ROOT_PATH", "https://example.org/app"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_is_a_sentence(name: str, value: str) -> None:
    """A user sets one variable wrongly and learns which, what it was and what it must be."""
    with pytest.raises(SettingError) as caught:
        Settings.read({name: value})
    message = str(caught.value)
    assert message.startswith(
        f"{name} (or --{name.lower().replace('_', '-')}) is {value!r}, but it"
    )
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql:///d", []),
        ("postgres://u:p@h/d", [("h", 5432)]),
        ("postgresql://u@a:1,b:2/d?target_session_attrs=read-write", [("a", 1), ("b", 2)]),
        ("postgresql://a,[::1]:7,b/d", [("a", 5432), ("::1", 7), ("b", 5432)]),
        ("postgresql://%2Fvar%2Frun:7/d", [("/var/run", 7)]),
        ("postgresql:///d?host=/run/postgresql", [("/run/postgresql", 5432)]),
        ("postgresql:///d?host=a,b&port=1,2", [("a", 1), ("b", 2)]),
        ("postgresql:///d?host=a,b&port=6432", [("a", 6432), ("b", 6432)]),
        ("postgresql://u:%2F%40%3A@h:6/d?sslmode=require", [("h", 6)]),
    ],
)
def test_the_hosts_of_a_database(url: str, hosts: list[tuple[str, int]]) -> None:
    """A user names a database in any of the ways that libpq knows."""
    assert database_hosts(url) == hosts
    assert Settings.read({"DATABASE_URL": url}).database_url == url


def test_misspelled_settings_are_noticed() -> None:
    """Variables of other programs may be called anything, the settings themselves included."""
    environ = dict.fromkeys(
        ["ALLOWED_ORIGIN", "FEED_RETENSION", "DATABASE_URI", "HOSTS", "PORTS", "PATH", "DATA_DIR",
         "XDG_DATA_DIRS", "HOSTNAME", "LOG_LEVEL", "THING"], "x",
    )  # fmt: skip
    assert misspelled(environ) == [
        ("ALLOWED_ORIGIN", "ALLOWED_ORIGINS"),
        ("DATABASE_URI", "DATABASE_URL"),
        ("FEED_RETENSION", "FEED_RETENTION"),
    ]


WRONG_URLS = [
    "secret", "mysql://u:secret@h/d", "postgresql://u:secret@h:x/d", "postgresql://u:secret@h:0/d",
    "postgresql://u:sec/ret@h/d", "postgresql://u:secret@@h/d", "postgresql://u:a@se/cret@h/d",
    "postgresql://u:se#cret@h/d",
    "postgresql://u:se?cret@h/d", "postgresql://u:secret@[::1/d", "postgresql://u:secret@a,/d",
    "postgresql://u:secret@:5432/d", "postgresql:///d?host=a,b&port=1,2,3&password=secret",
    "postgresql:///d?password=secret&host", "postgresql://u:secret@h:99999/d",
    "postgresql://u:secret@h/d?target_session_attrs=any-secret",
    "postgresql://u:secret@h/d?channel_binding=require",
]  # fmt: skip


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_database_url_is_not_repeated(url: str) -> None:
    """A user mistypes DATABASE_URL; the message does not contain the password."""
    with pytest.raises(SettingError) as caught:
        Settings.read({"DATABASE_URL": url})
    assert str(caught.value).startswith("DATABASE_URL (or --database-url) is wrong: it ")
    assert "secret" not in str(caught.value)
