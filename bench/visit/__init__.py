"""`python -m bench gpu`: a visit to a GPU, planned to the second.

plan.py says what a visit is for, in order of worth; schedule.py runs it within its seconds, each
unit in processes of its own; child.py is what such a process does, kernels.py the launches that a
sanitizer or profiler watches; lines.py keeps what they find, brought.py what is brought along.
The schedule imports no torch: it starts at once, and no fault of a unit reaches it.
"""
