"""How a run is trained: its data and configuration, the loop, the schedules, many runs at once."""
