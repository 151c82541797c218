"""The options of `throughput plan`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Measure the planning of a conversion, with names that are made up."""

    images: int = 1_281_167
    """So many; ImageNet's by default."""
    classes: int = 1000
    """In so many classes."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from tools.bench.plan import measure_plan

        cost = measure_plan(self.images, self.classes)
        print(cost.as_json() if self.json else cost)
        return 0
