"""The loss curves of several runs, drawn over one another."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curves(curves: dict[str, list[float]], path: str) -> None:
    """One line a run over its steps; later ones are drawn thinner, so that equal ones are seen to be equal."""
    # Without pyplot: a program's own figures and its choice of a backend are left alone.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (name, losses) in enumerate(curves.items()):
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=max(1.0, 5.0 - 3 * place), marker=".")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
