"""What people see: progress, the table, the report, and the logs that benchmarks ask for."""
