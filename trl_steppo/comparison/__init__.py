"""
Arms × seeds -> runs, each a process of its own, and what their directories say of them.

| file | what it is |
|---|---|
| `runs.py` | `PlannedRun`: what is started, and whether its directory holds it already |
| `processes.py` | `play`: runs as processes, as many at a time as there are slots |
| `slots.py` | each run's share of the machine: GPUs or cores |
| `plan.py` | `Arm`, and the runs of all arms and seeds of a script |
| `flags.py` | which settings a script takes |
| `progress.py` | how far a run is |
| `screen.py` | the runs on the terminal while they play |

`trl-steppo compare` and the programs in `benchmarks/` start their runs through it. It loads no torch.
"""
