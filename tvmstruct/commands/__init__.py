"""Commands, one file each; ``tvmstruct.cli`` lists them. Heavy modules are imported when used."""
