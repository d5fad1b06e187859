"""Dedicated feature crosscoders: what reinforcement learning changed, feature by feature.

The modules, in the order in which data meets them:

- ``paths profiles``: where things are; how much of everything a run uses
- ``pair prompts scoring``: models; prompt records and splits; rubrics and the ToolRL reward
- ``corpora budget``: where a profile's texts come from; what it needs of memory and disk
- ``activations``: caching the residual stream
- ``crosscoder training``: the crosscoder; one training run
- ``ranking autointerp geometry evolution``: reading its features
- ``interventions generation``: changing the stream; generating
- ``sweep``: the grid; ``statistics figures claims``: from outcomes to verdicts
- ``toyworld``: how the embedded pair is made
- ``freshness runner``: which notebooks need executing, and doing it (behind ``make``)

Nothing heavy is imported here: every notebook kernel pays for this line.
"""

__version__ = "0.1.0"
