"""Methods that others are compared with, on one encoder, in 2D and 3D: masked, two views, teachers, pairs, controls."""
