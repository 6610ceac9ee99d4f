"""This library's matcher behind the call signatures of other set-prediction libraries.

One module a library, imported only by who asks for it: ``transformers``, ``rt_detr`` (both versions), ``d_fine`` (DEIM
too) and ``rf_detr``. None of them imports the library that it serves. Into a criterion that holds a matcher, ours goes
by one line, with the weights of the one that it takes the place of:

    from detr_fast.integrations.d_fine import HungarianMatcher
    criterion.matcher = HungarianMatcher.like(criterion.matcher)

and into a model of transformers, which makes its criterion anew in every step, by ``transformers.use_in(model)``.

Each adapter computes its library's cost, in float32 at least. What differs, in all of them:

- A pair whose cost is not a number is matched only where no other is left. (RT-DETR stops with SciPy's error, D-FINE
  takes NaN for a cost of 1.)
- Two boxes without area have IoU 0, also where they are the same point, where the division gives NaN elsewhere.
- A predicted box of negative width or height is not refused, because looking for one waits for the device.
- Pairs across images are not computed, and all groups of queries are matched at once.

Indices are returned on the host, as in those libraries, which is the one wait for the device of a call.
"""
