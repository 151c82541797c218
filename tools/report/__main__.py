from tools.report.cli import main

if __name__ == "__main__":
    main()
