"""Jobs: units of work whose results are identified by a key of their inputs, and executors that run or reuse them."""
