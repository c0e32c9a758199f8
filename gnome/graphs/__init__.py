"""Crystal graphs: periodic neighbours and edge features."""
