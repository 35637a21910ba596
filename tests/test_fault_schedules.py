"""What publishers are told, and what clients see, while connections, clients, instances and engines fail."""

from __future__ import annotations

import pytest
from checker.campaign import Campaign

# Seeds of each profile. More: python tests/fault_schedules.py --schedules 1000 --profile ...
SEEDS = 10


@pytest.mark.parametrize("first", range(0, 20, SEEDS))
async def test_memory(first, tmp_path):
    """Clients that change their transport, stall and stay away; logs that end, are deleted and trimmed."""
    with Campaign("memory", tmp_path) as campaign:
        await campaign.run(range(first, first + SEEDS))
    assert not campaign.failures, "\n".join(campaign.failures)
    assert campaign.counts["ok"] > 100
    assert campaign.counts["gap"] + campaign.counts["reset"] > 0
