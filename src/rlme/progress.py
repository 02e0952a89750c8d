"""A bar whose time left goes by all steps so far: rich's own forgets what is older than half a minute, and has none
where a step takes longer."""

import math
from typing import Any

from rich.progress import Progress, ProgressColumn


class SlowProgress(Progress):
    """rich's `Progress` for steps of any length."""

    def __init__(self, *columns: str | ProgressColumn, **options: Any) -> None:
        super().__init__(*columns, speed_estimate_period=math.inf, **options)
