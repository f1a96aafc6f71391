"""The incidents of the simulated company: twelve kinds, each a few actions among ordinary ones.

Eight kinds consist of ordinary events only: usual actions of usual people at usual places and hours, in which order,
number, pace or absence is wrong. Four kinds have one event that is unusual by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from streamer.devtools.simulator import organisation as ocsf
from streamer.devtools.simulator.organisation import PROGRAMS, SITES, Person, Program, Running
from streamer.devtools.simulator.routines import Run
from streamer.devtools.simulator.workday import HOUR, MINUTE, PHONE_AGENT, Shift, Today


class Scene(NamedTuple):
    """The context of an incident: the day, its planned routines, random numbers, and the incident's id."""

    today: Today
    runs: list[Run]
    rng: Random
    mark: str


class Incident(NamedTuple):
    """A kind of incident: the function that makes it, whether each of its events is ordinary, and a summary in one
    line."""

    carry_out: Callable[[Scene], None]
    ordinary: bool
    summary: str


def _somebody(scene: Scene, *roles: str, hours: float = 6.0, travels: bool = False) -> tuple[Person, int, int]:
    """A person with an established routine, with begin and end of their work: at work for at least so long, and not
    part of another incident, where possible. If nobody works, one person is called in."""
    today = scene.today
    staff = [
        person
        for person in today.company.staff(today.index, *roles)
        if (person.joined == 0 or today.index - person.joined >= 5) and (person.travels or not travels)
    ]
    free = [person for person in staff if person.name not in today.taken] or staff
    present = [person for person in free if today.hours(person)]
    long = [person for person in present if _length(today, person) >= hours * HOUR]
    person = scene.rng.choice(long or present or free)
    today.taken.add(person.name)
    today.called_in.add(person.name)
    begins, ends = today.hours(person) or (today.start, today.start)
    return person, begins, ends


def _length(today: Today, person: Person) -> int:
    begins, ends = today.hours(person) or (0, 0)
    return ends - begins


def _acting(today: Today, person: Person, rng: Random, now: int) -> Shift:
    """The person's shift with all programs running, because an incident during the day does not begin with a logon."""
    shift = Shift(today, person, rng, now)
    for name in ("explorer", "outlook", "chrome", "winword"):
        shift.programs[name] = Running(PROGRAMS[name], shift.number())
    return shift


def _password_spray(scene: Scene) -> None:
    """One wrong password each for many people from an address that all their phones share, then a right one."""
    today, rng = scene.today, scene.rng
    settled = [person for person in today.company.staff(today.index) if not person.travels]
    site = SITES[rng.choice(settled).site]
    carrier = rng.choice(site.carriers)
    staff = [person for person in settled if SITES[person.site] is site]
    rng.shuffle(staff)
    tried = (staff * 2)[: max(16, min(len(staff), 40))]
    now = today.start + int(rng.uniform(10, 16) * HOUR)
    for person in tried:
        shift = Shift(today, person, rng, now)
        shift.sign_in("mail", carrier, site, PHONE_AGENT, success=False)
        now = shift.now + int(rng.uniform(4, 30) * 1000)
    shift = Shift(today, rng.choice(tried), rng, now)
    shift.sign_in("mail", carrier, site, PHONE_AGENT)


def _slow_scan(scene: Scene) -> None:
    """A workstation asks every neighbour for updates, one every few minutes, none of which has them."""
    today, rng = scene.today, scene.rng
    person, begins, ends = _somebody(scene, hours=7.0)
    neighbours = [other.host for other in today.company.staff(today.index) if other is not person]
    rng.shuffle(neighbours)
    neighbours = (neighbours * 4)[: max(40, min(len(neighbours), 90))]
    shift = _acting(today, person, rng, begins + 20 * MINUTE)
    pause = min(6 * MINUTE, (ends - begins - 40 * MINUTE) // len(neighbours))
    for host in neighbours:
        begun = shift.now
        shift.ask_neighbour(host, has_it=False)
        shift.now = begun + int(pause * rng.uniform(0.6, 1.4))


def _exfiltration_drip(scene: Scene) -> None:
    """Uploads of the usual size to the usual storage, one every few minutes for hours."""
    today, rng = scene.today, scene.rng
    person, begins, ends = _somebody(scene, "sales", "finance", hours=7.0)
    shift = _acting(today, person, rng, begins + 30 * MINUTE)
    pause = min(6 * MINUTE, (ends - begins - HOUR) // 60)
    for _drop in range(60):
        begun = shift.now
        shift.send_to_storage(int(2_500_000 * rng.uniform(0.7, 3.0)))
        shift.now = begun + int(pause * rng.uniform(0.7, 1.3))


def _impossible_travel(scene: Scene) -> None:
    """Somebody who works two days here and two days there signs in from there in the middle of a day here."""
    today, rng = scene.today, scene.rng
    person, begins, ends = _somebody(scene, "sales", hours=4.0, travels=True)
    here = person.site_on(today.index)
    there = SITES[SITES.index(here) ^ 1]
    shift = Shift(today, person, rng, begins + int((ends - begins) * rng.uniform(0.3, 0.6)))
    shift.sso()
    shift.now += int(rng.uniform(8, 25) * MINUTE)
    shift.address, shift.site = there.egress, there
    for _visit in range(2 + rng.getrandbits(1)):
        shift.sso()
        shift.wait(240)


def _persistence(scene: Scene) -> None:
    """A remote logon such as the helpdesk makes all day, and at once a job that only an installer makes otherwise."""
    today, rng = scene.today, scene.rng
    person, begins, ends = _somebody(scene, "it", hours=4.0)
    others = [p.host for p in today.company.staff(today.index) if p is not person]
    shift = _acting(today, person, rng, begins + int((ends - begins) * rng.uniform(0.2, 0.8)))
    host = rng.choice(others)
    shift.enter(host)
    shift.schedule(host, person.user, rng.choice(("LedgerOne", "Viewer", "Browser")))
    shift.wait(40)
    shift.log_on(host, 10, off=True)


def _spoiled_run(scene: Scene) -> Run:
    runs = [
        run
        for run in scene.runs
        if not run.mark
        and run.service.routine in ("orders", "billing")
        and HOUR < run.begins - scene.today.start < 23 * HOUR
    ]
    run = scene.rng.choice(runs)
    run.mark = scene.mark
    return run


def _skipped_step(scene: Scene) -> None:
    """The service leaves out its check."""
    run = _spoiled_run(scene)
    run.steps.remove("validate" if run.service.routine == "orders" else "reconcile")


def _wrong_order(scene: Scene) -> None:
    """The service publishes, or sends, before it has made what it publishes."""
    run = _spoiled_run(scene)
    early, late = ("write", "publish") if run.service.routine == "orders" else ("render", "send")
    i, k = run.steps.index(early), run.steps.index(late)
    run.steps[i], run.steps[k] = run.steps[k], run.steps[i]


def _silent_routine(scene: Scene) -> None:
    """The service stops half-way through a run; the next run is complete."""
    run = _spoiled_run(scene)
    del run.steps[scene.rng.choice((3, 4)) :]


def _rare_process_tree(scene: Scene) -> None:
    """A word processor starts a shell, which starts a script."""
    today, rng = scene.today, scene.rng
    person, begins, ends = _somebody(scene, hours=3.0)
    shift = _acting(today, person, rng, begins + int((ends - begins) * rng.uniform(0.2, 0.8)))
    shell = Running(PROGRAMS["powershell"], shift.number())
    shift.launch(shift.running("winword"), shell, "powershell.exe -nop -w hidden -enc SQBFAFgAIAAoAE4AZQB3AC0ATwBiAGoA")
    shift.launch(shell, Running(PROGRAMS["cmd"], shift.number()), "cmd.exe /c whoami /all")


def _admin_from_new_place(scene: Scene) -> None:
    """An administrator's keys are used from an address where nobody of the company has ever been."""
    today, rng = scene.today, scene.rng
    person, begins, ends = _somebody(scene, "it", hours=2.0)
    shift = Shift(today, person, rng, begins + int((ends - begins) * rng.uniform(0.2, 0.9)))
    shift.address = f"198.19.{rng.randint(1, 250)}.{rng.randint(1, 250)}"
    shift.location = {"city": "Recife", "country": "BR"}
    victim = rng.choice(today.company.staff(today.index)).name
    shift.call("identity", "CreateAccessKey", 1, victim)
    shift.call("identity", "AttachPolicy", 3, victim)


def _unseen_binary(scene: Scene) -> None:
    """A service host starts a program from a place where programs do not live."""
    today, rng = scene.today, scene.rng
    person, begins, ends = _somebody(scene, hours=2.0)
    shift = _acting(today, person, rng, begins + int((ends - begins) * rng.uniform(0.1, 0.9)))
    odd = Program("svch0st.exe", "C:\\ProgramData\\Fonts\\svch0st.exe")
    parent = Running(PROGRAMS["svchost"], person.index)
    child = Running(odd, shift.number())
    shift.add(ocsf.process(shift.wait(2), shift.host, person.user, parent, child, f"{odd.path} -k net"))


def _night_deletion(scene: Scene) -> None:
    """Somebody's account empties a share at an hour when they sleep."""
    today, rng = scene.today, scene.rng
    person, _begins, _ends = _somebody(scene, hours=0.0)
    server = today.company.by_name[person.site_on(today.index).file_server]
    shift = Shift(today, person, rng, today.start + int(rng.uniform(1.5, 4.0) * HOUR))
    shift.log_on(server, 3)
    for _each in range(45):
        shift.touch_share(server, 4)


KINDS: dict[str, Incident] = {
    "password_spray": Incident(_password_spray, True, "many people's passwords tried once each, one with success"),
    "slow_scan": Incident(_slow_scan, True, "a workstation tries every neighbour in turn, over hours"),
    "exfiltration_drip": Incident(_exfiltration_drip, True, "many uploads of ordinary size, over hours"),
    "impossible_travel": Incident(_impossible_travel, True, "two sites, both usual, within minutes"),
    "persistence_after_logon": Incident(_persistence, True, "a scheduled job right after a remote logon"),
    "skipped_step": Incident(_skipped_step, True, "a routine without its check"),
    "wrong_order": Incident(_wrong_order, True, "a routine whose steps change places"),
    "silent_routine": Incident(_silent_routine, True, "a routine that falls silent half-way"),
    "rare_process_tree": Incident(_rare_process_tree, False, "a word processor starts a shell"),
    "admin_from_new_place": Incident(_admin_from_new_place, False, "administration from an address never seen"),
    "unseen_binary": Incident(_unseen_binary, False, "a program from where programs do not live"),
    "night_deletion": Incident(_night_deletion, False, "files deleted in bulk at night"),
}
ORDINARY = tuple(kind for kind, incident in KINDS.items() if incident.ordinary)
"""The kinds whose events are all ordinary."""
