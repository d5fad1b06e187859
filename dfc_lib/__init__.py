"""Dedicated feature crosscoders: what reinforcement learning changed, feature by feature.

What notebooks import, in the order in which data meets it; a module imports only from those above:

- ``paths profiles store provenance``: where things are; how much of everything a run uses; what is
  kept on disk, and what it was made with
- ``data``: models, prompts, texts, their activations; how an answer is scored
- ``crosscoder``: the crosscoder, its training, the recipes that notebooks share
- ``steering``: interventions on the stream, generating under them, what models then do
- ``reading``: ranking features, saying what they stand for, how they came to be
- ``results``: statistics, tables, figures, and claims with their verdicts
- ``study``: a profile with all of this behind it, which a notebook opens first

Nothing heavy is imported here: every notebook kernel pays for this line.
"""

__version__ = "0.1.0"
