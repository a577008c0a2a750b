"""What happened: pages, tables and figures, from run folders and from the figures of fleets."""

from fedmira.report.alignment import write_alignment
from fedmira.report.comparison import write_comparison
from fedmira.report.comparison_figures import Figures
from fedmira.report.decision import ClientDecision, Decisions, write_decision
from fedmira.report.findings import SummaryRow, summary_rows
from fedmira.report.joining import write_joining
from fedmira.report.page import write_report
from fedmira.report.pictures import Picture, picture_of_graph, picture_of_rounds
from fedmira.report.read import read_run
from fedmira.report.records import Client, Event, Round, Run, TaskGraph
from fedmira.report.targets import Reached, check_target, reached
from fedmira.report.tuning import write_tuning

__all__ = [
    "Client",
    "ClientDecision",
    "Decisions",
    "Event",
    "Figures",
    "Picture",
    "Reached",
    "Round",
    "Run",
    "SummaryRow",
    "TaskGraph",
    "check_target",
    "picture_of_graph",
    "picture_of_rounds",
    "reached",
    "read_run",
    "summary_rows",
    "write_alignment",
    "write_comparison",
    "write_decision",
    "write_joining",
    "write_report",
    "write_tuning",
]
