"""Audits submission folders of the challenge from their files alone: README, submission.json, logs and scripts.

Nothing that is checked is ever run or imported: scripts are unpacked within bounds and parsed, logs are read line by
line. A finding has a rule, a severity, the values with what to do, and the file and line. `reject`: a written rule or a
ruling of the organizers is broken by the folder's own figures. `warn`: merged records have it too, a reviewer will ask.
`note`: good to know. What is not found is said to be not found; nothing is guessed.

    reading, submission, logs, scripts     what stands in a file
    folder                                 all of a folder, and the log lines that its headline rests on
    rules                                  what a rule is; the modules of rules, by subject, are imported below
    command                                running them, and printing
"""

from . import files, sizes, seconds, metric, claims, order, mechanisms, portability  # noqa: F401, I001 - the order of the rules
from .command import audit, main

__all__ = ["audit", "main"]
