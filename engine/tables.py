"""Summaries of evaluations as tables on the screen."""

import math

from .errors import printable

WIDTH = 120  # characters of a line of a table


def metric_names(group):
    """The metrics of one group of a summary, without their standard errors."""
    return [name for name in group if name != "problems" and not name.endswith("_se")]


def mean_over_sets(groups):
    """Unweighted mean of each metric over data sets; its standard error is that of independent sets, None if one has none."""
    mean = {"problems": sum(group["problems"] for group in groups)}
    for metric in metric_names(groups[0]):
        errors = [group[f"{metric}_se"] for group in groups]
        mean[metric] = sum(group[metric] for group in groups) / len(groups)
        mean[f"{metric}_se"] = None if None in errors else math.hypot(*errors) / len(groups)
    return mean


def print_table(summary):
    """One line per group, one column per metric, each "mean +- standard error"; below each other where they are wider than WIDTH."""
    metrics, width = metric_names(next(iter(summary.values()))), max(10, *(len(label) + 2 for label in summary))
    columns = max(1, (WIDTH - width - 9) // 17)
    for some in (metrics[start : start + columns] for start in range(0, len(metrics), columns)):
        print(f"{'':<{width}}{'problems':>9}" + "".join(f"{metric:>17}" for metric in some))
        for label, group in summary.items():
            errors = [group[f"{metric}_se"] for metric in some]
            cells = [f"{group[metric]:.3f}" + ("" if error is None else f" +- {error:.3f}") for metric, error in zip(some, errors)]
            print(f"{printable(label):<{width}}{group['problems']:>9}" + "".join(f"{cell:>17}" for cell in cells))


def table_of_sets(data_sets, mean):
    """The groups of the table for several data sets: those of each set's summary, and the mean over sets."""
    groups = {f"{name} {group}": numbers for name, record in data_sets.items() for group, numbers in record["summary"].items()}
    return groups | {f"mean of {len(data_sets)} sets": mean}
