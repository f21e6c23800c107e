"""One module per subcommand: config section to plan to table."""
