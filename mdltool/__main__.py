from mdltool.cli.main import main

main()
