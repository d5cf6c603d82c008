"""Many speeches at once in one process, over the modules of the voxcpm package.

`rows.Batch` has a fixed number of rows, a speech in each, and computes all of them at every step, whether in use or
not: so no kernel is chosen by the load, and a speech has the same samples whatever is spoken beside it. `steps.Steps`
is the one thread that uses the device; `seat.Seat` is what a run sees of all this, in place of a `Model`.
"""
