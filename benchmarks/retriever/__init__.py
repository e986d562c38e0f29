"""The model of the demo: the tasks it solves, and how it is trained, in `make train`."""
