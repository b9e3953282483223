"""A study: PPO with several references, at several KL coefficients, on several draws, and what comes of it.

    python -m analysis.study --config study/reviews.yaml

A **draw** is everything made anew from one seed: data, models, reward model, PPO. It is the unit of replication: arms
are compared draw by draw, intervals are over draws. ``docs/study.md`` is the protocol of the project's own study.

=============  =======================================================================================================
`config`       what a study consists of, read from YAML
`grid`         doing what is not done yet: stages, predictions and runs, in parallel; what a kill leaves is gone on with
`measures`     what one policy is worth, and what samples of a reference promise
`store`        the tables of results, one row a run, that everything below is made from
`references`   which models the arms' references are made of
`effects`      arm against arm, paired by draw; reward at equal KL
`inference`    one number a draw: means, intervals, p-values
`questions`    the claims, the mixing weight, the predictions
`sections`     the tables of the page, and its figures
`page`         putting them into the page
=============  =======================================================================================================
"""

from __future__ import annotations
