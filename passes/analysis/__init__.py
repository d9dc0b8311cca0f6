"""What a graph holds: equal values, effects, projections, low-rank paths. Nothing here changes the graph."""
