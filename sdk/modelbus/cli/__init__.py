"""The command line: ``modelbus COMMAND``. One module per group of commands.

| module | commands |
|---|---|
| ``hosts`` | start, stop, status |
| ``models`` | deploy, undeploy, models, stat, logs |
| ``ask`` | query |
| ``gateway`` | serve |

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no bus (or nothing runs), 4 no such model.
"""

from .main import cli, main

__all__ = ["cli", "main"]
