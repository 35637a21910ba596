// Command watch reads event streams with a Go client until the server ends them for good, and writes each
// message as a line of JSON: watch CLIENT URL...
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"

	r3labs "github.com/r3labs/sse/v2"
	tmaxmax "github.com/tmaxmax/go-sse"
	"gopkg.in/cenkalti/backoff.v1"
)

const retry = 10 * time.Millisecond

var errEnded = errors.New("the stream has ended for good")

// A Message is one line of the output. Data has its quotes and line ends escaped.
type Message struct {
	URL   string `json:"url"`
	Event string `json:"event"`
	ID    string `json:"id"`
	Data  string `json:"data"`
}

var output sync.Mutex

func write(url, event, id, data string) {
	if event == "" {
		event = "message"
	}
	line, err := json.Marshal(Message{url, event, id, data})
	if err != nil {
		panic(err)
	}
	output.Lock()
	defer output.Unlock()
	fmt.Println(string(line))
}

// r3labs/sse reads the end of a response as the end of the stream, and gives up or retries by the error: its user
// says which one is final.
func watchR3labs(url string) error {
	client := r3labs.NewClient(url)
	client.ReconnectStrategy = backoff.NewConstantBackOff(retry)
	client.ResponseValidator = func(_ *r3labs.Client, response *http.Response) error {
		if response.StatusCode == http.StatusOK {
			return nil
		}
		response.Body.Close()
		if response.StatusCode == http.StatusNoContent {
			return backoff.Permanent(errEnded)
		}
		return fmt.Errorf("status %d", response.StatusCode)
	}
	return client.SubscribeRaw(func(message *r3labs.Event) {
		// It also hands out what it has of a message when the connection breaks, and lines without data.
		if json.Valid(message.Data) {
			write(url, string(message.Event), string(message.ID), string(message.Data))
		}
	})
}

func watchTmaxmax(url string) error {
	request, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	client := tmaxmax.Client{
		Backoff: tmaxmax.Backoff{InitialInterval: retry, Multiplier: 1, Jitter: -1},
		ResponseValidator: func(response *http.Response) error {
			if response.StatusCode == http.StatusNoContent {
				return errEnded
			}
			return tmaxmax.DefaultValidator(response)
		},
	}
	connection := client.NewConnection(request)
	connection.SubscribeToAll(func(message tmaxmax.Event) {
		write(url, message.Type, message.LastEventID, message.Data)
	})
	return connection.Connect()
}

func main() {
	watch := map[string]func(string) error{"r3labs": watchR3labs, "tmaxmax": watchTmaxmax}[os.Args[1]]
	var streams sync.WaitGroup
	for _, url := range os.Args[2:] {
		streams.Add(1)
		go func(url string) {
			defer streams.Done()
			if err := watch(url); err != nil && !errors.Is(err, errEnded) {
				fmt.Fprintln(os.Stderr, url, err)
				os.Exit(1)
			}
		}(url)
	}
	streams.Wait()
}
