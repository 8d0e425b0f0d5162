"""From a solver's textbook code to a table of linear rows: symbols, tracing, slots; no image."""

from fastdiff.tableau.form import Form
from fastdiff.tableau.tableau import Langevin, Stage, Tableau, Write
from fastdiff.tableau.trace import Trace, trace_solver

__all__ = ["Form", "Langevin", "Stage", "Tableau", "Trace", "Write", "trace_solver"]
