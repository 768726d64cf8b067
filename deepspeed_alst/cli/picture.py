"""Plot of several runs' loss curves in one figure."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curves(curves: dict[str, list[float]], path: str) -> None:
    """Draw one curve per run over its steps; later ones are thinner, so that equal ones stay visible."""
    # pyplot would change the program's own figures and backend.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (name, losses) in enumerate(curves.items()):
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=max(1.0, 5.0 - 3 * place), marker=".")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
