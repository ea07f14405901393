"""Whether the nodes of a cluster are as fast as each other: measured, judged against their peers, named."""
