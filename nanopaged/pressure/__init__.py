"""When memory runs out: whom to admit, in which order, where preempted KV waits, and when work is thrown away."""
