"""Campaigns on a schedule: a Prefect deployment served by this process."""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.schedules import Cron, Schedule
from prefect.server.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType

from flows.campaign import campaign_flow
from flows.prefect_round import settings_parameters
from flows.prefect_server import use_server, without_password
from flows.progress import Listener, Silent
from flows.settings import CampaignSettings, RoundSettings, Settings
from gnome.errors import InvalidInput
from gnome.processes import child_environment


def serve_campaign(
    settings: Settings,
    wanted: RoundSettings,
    campaign: CampaignSettings,
    *,
    cron: str,
    name: str,
    listener: Listener | None = None,
) -> None:
    """Serve the deployment until interrupted; a run that would overlap the one before is not started.

    Without a server in PREFECT_API_URL one is started that fires runs while this process lives.
    Raises InvalidInput for a schedule that cannot be read, GnomeError for a server that does not answer.
    """
    schedule, first = read_cron(cron)
    listener = listener or Silent()
    ours, folder = not PREFECT_API_URL.value(), str(Path.cwd())
    with use_server(scheduling=True) as url:
        listener.say(
            f"Campaign {name!r} is started at {cron!r} (UTC), first at {first:%Y-%m-%d %H:%M}, while this command runs; Ctrl-C ends it.  "
            + (
                f"PREFECT_API_URL is not set: a temporary Prefect server at {url} keeps the time."
                if ours
                else f"Prefect server: {without_password(url)}."
            )
        )
        with _neutral_folder():
            campaign_flow.serve(
                name=name,
                schedule=schedule,
                parameters={
                    "settings": settings_parameters(settings),
                    "round_settings": wanted.to_dict(),
                    "campaign": dict(vars(campaign)),
                    "folder": folder,
                },
                global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
                pause_on_shutdown=ours,  # nothing would fire it, and what was missed would be made up for all at once
                print_starting_message=False,
                entrypoint_type=EntrypointType.MODULE_PATH,
                description="Rounds of discovery: propose, filter, relax, learn.",
            )


def read_cron(cron: str) -> tuple[Schedule, datetime]:
    """Read a schedule of five fields, as in crontab, and when it comes next; raises InvalidInput.

    Prefect would read a sixth field as seconds and a seventh as years, and take a day that never comes.
    """
    n_fields = len(cron.split())
    problem = f"it has {n_fields}" if n_fields != 5 and not cron.strip().startswith("@") else ""
    if not problem:
        try:
            schedule = Cron(cron)
            (first,) = asyncio.run(CronSchedule(cron=cron).get_dates(n=1))
            return schedule, first
        except ValueError as error:
            problem = str(error)
    raise InvalidInput(f"--cron {cron!r} cannot be used ({problem}); five fields are expected, as in '0 3 * * *'")


@contextlib.contextmanager
def _neutral_folder() -> Iterator[None]:
    """Stand in an empty folder, where the runs that Prefect starts find the modules that this process has, and no others of their names."""
    ours = child_environment()  # its number of threads is for one of many children, a run has the machine for itself
    changed = {name: ours[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        with tempfile.TemporaryDirectory(prefix="gnome-") as folder, contextlib.chdir(folder):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
