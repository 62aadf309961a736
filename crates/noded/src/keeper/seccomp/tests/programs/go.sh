# The Go runtime with threads, sockets (which try MPTCP first) and children (by pidfd).
export GOTOOLCHAIN=local GOCACHE="$PWD/cache" GOPATH="$PWD/path" CGO_ENABLED=0
mkdir m
cd m
printf 'module a\ngo 1.20\n' > go.mod
cat > a.go <<'END'
package main

import (
	"fmt"
	"net"
	"os/exec"
	"sync"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		connection, _ := listener.Accept()
		connection.Write([]byte("x"))
		connection.Close()
	}()
	connection, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		panic(err)
	}
	byte := make([]byte, 1)
	connection.Read(byte)
	var group sync.WaitGroup
	for i := 0; i < 100; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			if err := exec.Command("true").Run(); err != nil {
				panic(err)
			}
		}()
	}
	group.Wait()
	fmt.Println(string(byte))
}
END
go version
go build -o a .
./a
