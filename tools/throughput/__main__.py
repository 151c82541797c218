from tools.throughput.cli import main

if __name__ == "__main__":
    main()
