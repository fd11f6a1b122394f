"""What Slurm's commands print, read: the texts are recorded from Slurm 22.05.8."""

from __future__ import annotations

import math

import pytest

from scripts.lib import slurm
from scripts.lib.slurm import Association

SINFO = """\
gpu|gpu*|up|1-12:30:00|1-infinite|32|256000|gpu:a100:4|ampere,ib|3|down*|small[01-03]
gpu|gpu*|up|1-12:30:00|1-infinite|96|1500000|gpu:h200:8|hopper,ib|2|idle|big[01-02]
debug|debug|down|30:00|1|32|256000|gpu:a100:4|ampere,ib|3|down*|small[01-03]
long|long|up|infinite|1-infinite|96|1500000|(null)|(null)|2|mixed|big[01-02]
"""

SETTINGS = """\
Configuration data as of 2026-11-23T09:11:57
AccountingStorageEnforce = associations,limits,qos
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = acct
KillWait                = 30 sec
LaunchParameters        = use_interactive_step
MailDomain              = (null)
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""

ASSOCIATIONS = "teaching|debug|high,normal\nresearch||high,normal\nroot||\n"


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch):
    said = {"sinfo": SINFO, "scontrol": SETTINGS, "sacctmgr": ASSOCIATIONS}
    monkeypatch.setattr(slurm, "ask", lambda *words: said[words[0]])


def test_machines_are_read_with_the_limits_of_their_partition():
    small, big, debug, long = slurm.machines()
    assert (small.partition, small.default, small.state) == ("gpu", True, "up")
    assert (small.cpus, small.memory_mb, small.count) == (32, 256000, 3)
    assert small.features == {"ampere", "ib"} and small.minutes == 36 * 60 + 30
    assert not small.usable and big.usable and long.usable
    assert (debug.at_once, debug.state, debug.default) == (1, "down", False)
    assert math.isinf(long.minutes) and math.isinf(long.at_once)
    assert long.gres == {} and long.features == frozenset()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("1-00:00:00", 1440),
        ("12:30:00", 750),
        ("5:00", 5),
        ("0:30", 0.5),
        ("30", 30),
        ("2-3:30", 3090),
        ("1-0", 1440),
        ("infinite", math.inf),
        ("n/a", math.inf),
    ],
)
def test_limits_are_read_as_minutes(text: str, minutes: float):
    assert slurm.minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("gpu:h200:8", {"gpu": 8, "gpu:h200": 8}),
        ("gpu:h200:8(S:0-1)", {"gpu": 8, "gpu:h200": 8}),
        (
            "gpu:a100:4(S:0,1),gpu:v100:2,nic:1",
            {"gpu": 6, "gpu:a100": 4, "gpu:v100": 2, "nic": 1},
        ),
        ("gpu:3g.20gb:2(S:1)", {"gpu": 2, "gpu:3g.20gb": 2}),
        ("gpu:no_consume:8", {"gpu": 8}),
        ("gpu", {"gpu": 1}),
        ("(null)", {}),
    ],
)
def test_gres_is_counted_by_name_and_type(text: str, counts: dict[str, int]):
    assert slurm.gres_of(text) == counts


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("a1,b[2-3]", "a1"),
        ("gpu-[001-004,007],m1", "gpu-001"),
        ("rack[1-2]node[03,05-06]", "rack1node03"),
    ],
)
def test_one_machine_is_taken_of_many(names: str, first: str):
    assert slurm.first_name(names) == first


def test_settings_and_accounts_are_read():
    settings = slurm.settings()
    assert settings["KillWait"] == "30 sec" and settings["ClusterName"] == "acct"
    assert settings["AccountingStorageEnforce"] == "associations,limits,qos"
    assert slurm.associations("root", "acct") == [
        Association("teaching", "debug", frozenset({"high", "normal"})),
        Association("research", "", frozenset({"high", "normal"})),
        Association("root", "", frozenset()),
    ]
