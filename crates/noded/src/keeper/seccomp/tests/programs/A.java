class A {
    public static void main(String[] arguments) throws Exception {
        Thread thread = new Thread(() -> System.out.println("hi"));
        thread.start();
        thread.join();
        new ProcessBuilder("true").start().waitFor();
        new java.net.ServerSocket(0).close();
        java.nio.channels.Selector.open().close();
    }
}
