"""Campaigns on a schedule: a Prefect deployment served by this process."""

import httpx
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL

from flows.campaign import campaign_flow
from flows.prefect_round import settings_parameters
from flows.settings import CampaignSettings, RoundSettings, Settings
from gnome.errors import InvalidInput


def serve_campaign(settings: Settings, wanted: RoundSettings, campaign: CampaignSettings, *, cron: str, name: str) -> None:
    """Serve the deployment until interrupted; a run that would overlap the one before is not started.

    Raises InvalidInput for a schedule that cannot be read or a server that does not answer.
    """
    try:
        schedule = Cron(cron)
    except ValueError as error:
        raise InvalidInput(f"--cron {cron!r} cannot be read ({error}); five fields are expected, as in '0 3 * * *'") from None
    _require_server()
    campaign_flow.serve(
        name=name,
        schedule=schedule,
        parameters={
            "settings": settings_parameters(settings),
            "round_settings": wanted.to_dict(),
            "campaign": dict(vars(campaign)),
        },
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        pause_on_shutdown=False,
        description="Rounds of discovery: propose, filter, relax, learn.",
    )


def _require_server() -> None:
    """Say in one line that the Prefect server named by the environment does not answer, before Prefect says it in a hundred."""
    url = PREFECT_API_URL.value()
    if not url:
        return
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InvalidInput(
            f"the Prefect server at PREFECT_API_URL={url} does not answer ({error}); start it with `prefect server start`"
        ) from None
